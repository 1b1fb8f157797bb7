"""350,000 icons of Iconify with their names: curated, aligned, and tested on the unseen. See README.md."""
