"""The benchmark: this service, its rivals and the physical limit, side by side on one machine (`make bench`)."""
