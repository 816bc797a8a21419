"""The layers in other libraries' models, each a module that is imported by name: `transformers`, `fla`."""
