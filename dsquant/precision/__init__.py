"""Which width or type each group of linears gets: groups, measured sensitivity, allocation."""
