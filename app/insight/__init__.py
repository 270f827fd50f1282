"""How sure a model is, and what it sees alike: calibration, reports, embeddings. Imported by the command line, or with
the first request to /embed."""
