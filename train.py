"""Train a T5-VAE: `deepspeed train.py [CONFIG] [dotted.key=value ...]`.

CONFIG defaults to configs/quickstart.yaml. `python train.py` runs one process; torchrun and srun
work too. See `t5vae config schema` for the keys.
"""

import sys

from t5vae.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
