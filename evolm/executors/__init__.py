"""Where trials run: an executor runs what it is given and proposes nothing."""
