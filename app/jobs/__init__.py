"""Jobs: work that takes longer than a client waits, carried by Celery to workers. The core never imports it."""
