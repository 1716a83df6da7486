"""`python -m freqkd_train` is `freqkd-train`; torchrun starts it this way."""

from freqkd_train.cli import main

if __name__ == "__main__":
    main()
