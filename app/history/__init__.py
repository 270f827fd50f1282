"""History: what was predicted, in a database. The core never imports it."""
