__version__ = "0.0.1"

_modules = 'headers', 'awq_loading', 'streaming', 'quantized_linear', 'stdlib_text', 'sources', 'calibration', 'expert_analysis', 'grouping', 'calibration_pass', 'fusion', 'merging', 'neuron_choice', 'grouped', 'multiplex_lora', 'baselines', 'fused_model', 'fused_student', 'healing', 'checkpoint', 'fused_files', 'evaluation', 'llama_cpp', 'quantized_checkpoint', 'heal', 'model_card', 'pipeline', 'planning', 'analysis', 'budgets', 'deepseek_moe', 'upcycling'

def __getattr__(name):
    "Public names of all modules, imported when they are asked for: `import moe_fuse` alone loads no torch."
    from importlib import import_module
    if name.startswith('_') or name in _modules: raise AttributeError(f"module 'moe_fuse' has no attribute {name!r}")
    for m in _modules:
        mod = import_module(f'moe_fuse.{m}')
        if name in mod.__all__: return getattr(mod, name)
    raise AttributeError(f"module 'moe_fuse' has no attribute {name!r}")
