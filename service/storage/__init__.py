"""What is kept: finished stages, artifacts, profiles, blobs."""
