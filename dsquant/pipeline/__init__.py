"""The one job: inputs, plan, memory, units, finish, record."""
