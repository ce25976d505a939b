"""The ops by name, one file each: schema, fake, autograd, choice of the implementation, public function."""
