"""LoRA in a model: its factor pairs (`pairs`) and the frozen weights under them (`frozen`). Builds on errors alone."""
