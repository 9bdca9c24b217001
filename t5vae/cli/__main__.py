from t5vae.cli import main

main()
