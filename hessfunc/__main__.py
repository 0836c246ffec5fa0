"""Entry point of ``python -m hessfunc`` and ``torchrun --nproc-per-node 2 -m hessfunc``."""

from hessfunc.app.cli import main

if __name__ == "__main__":
    main()
