"""What the methods are made of: what happens around a base's step, its arithmetic, and checks of options.

For the methods beside this folder; programs take `equipoise.attach` and the classes. Builds on lora.
"""
