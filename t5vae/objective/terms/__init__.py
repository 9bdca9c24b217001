"""The terms of the objective, a file each. They load torch once they are computed."""
