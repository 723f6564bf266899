"""How programs that know nothing of Equipoise get its optimizers: thin adapters, one program family each."""
