"""Where a solver's scales can go so that engines have nothing to apply, and how they are put there."""
