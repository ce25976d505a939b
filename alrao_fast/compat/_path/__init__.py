"""A folder for `sys.path`, in which `import alrao` finds `alrao_fast.compat`: for processes that a script starts."""
