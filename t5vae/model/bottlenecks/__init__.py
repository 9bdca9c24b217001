"""The bottlenecks, a file each; the table `BOTTLENECKS` of `t5vae.common.kinds` names them."""
