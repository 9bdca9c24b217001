"""Where files lie: on this machine, or at a URL with copies in the node's cache."""
