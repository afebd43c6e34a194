"""The ``lorafleet`` command: parse, call one library function, print. Results on stdout, everything else on stderr."""
