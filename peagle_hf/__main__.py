"""`python -m peagle_hf <command>`, which `torchrun -m peagle_hf train` starts."""

from .cli import main

main()
