"""What `make` calls: text to notebook, notebook to page, the repository's address."""
