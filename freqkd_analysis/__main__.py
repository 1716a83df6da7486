"""`python -m freqkd_analysis`: the same as `freqkd-analyze`, for torchrun and for uninstalled checkouts."""

from freqkd_analysis.cli import main

if __name__ == "__main__":
    main()
