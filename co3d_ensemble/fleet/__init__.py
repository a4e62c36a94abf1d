"""All sequences over many devices: jobs, claims, supervised children, what is on disk, status and summary."""
