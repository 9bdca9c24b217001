"""The processes of a run, their hosts, and the scheduler that started them."""
