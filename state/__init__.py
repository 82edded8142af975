"""What survives: the store of a run, its layout, identity and durability. No torch in here."""
