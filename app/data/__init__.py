"""What stays: the database of jobs and history, and the storage of what jobs work on. The core never imports it."""
