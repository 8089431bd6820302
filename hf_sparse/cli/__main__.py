"""`python -m hf_sparse.cli` is `hf-sparse`."""

from hf_sparse.cli.app import main

main()
