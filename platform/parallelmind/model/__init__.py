"""2D RoPE: the patch, masks and attention; base models and adapters."""

import logging

# peft imports bitsandbytes where it is installed, which warns on some CPUs that it lacks an optional kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
