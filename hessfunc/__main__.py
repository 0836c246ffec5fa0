"""``python -m hessfunc``, and ``torchrun --nproc-per-node 2 -m hessfunc``."""

from hessfunc.cli import main

if __name__ == "__main__":
    main()
