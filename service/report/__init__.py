"""The report of a run: document, page, pictures, delivery."""
