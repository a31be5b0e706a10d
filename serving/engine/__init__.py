"""The engine deployment: the model, its adapters, and the thread that steps the engine."""
