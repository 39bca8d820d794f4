"""Where a repository's objects live: six calls on a directory or an S3 bucket."""
