"""`python -m slimgraph` is `slimgraph`."""

from slimgraph.cli.main import main

if __name__ == "__main__":
    main()
