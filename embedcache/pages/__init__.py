"""Pages that hold all they show: one look for every report, and nothing asked for from outside."""
