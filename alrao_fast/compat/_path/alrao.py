"""`import alrao` without `install()`: it takes this module's place by that of `alrao_fast.compat`."""

import sys

from alrao_fast.compat import install

del sys.modules[__name__]
install(__name__)
