"""Train a T5-VAE: `deepspeed train.py [CONFIG] [section.key=value ...]`."""

import sys

from t5vae.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
