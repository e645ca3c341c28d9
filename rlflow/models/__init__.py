"""Networks, and the only files that know foreign conventions."""
