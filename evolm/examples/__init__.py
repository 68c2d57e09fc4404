"""Programs that `evolm init` writes beside a space file, to start from."""
