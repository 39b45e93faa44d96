from dataclasses import fields

from janus_dola import DoLaConfig, DoLaJanusWrapper
from janus_dola.call import Call


def generate(*args, model, **kwargs):
    """`model.generate` with DoLa. Its keys: arguments win over the call's generation config, that over the model's."""
    given = kwargs.get("generation_config")
    values = vars(model.generation_config) | ({} if given is None else vars(given)) | kwargs
    config = DoLaConfig(**{key.name: values[key.name] for key in fields(DoLaConfig) if key.name in values})
    if kwargs.get("generation_mode") != "image":
        Call(model, args, kwargs).check_positions()
    wrapper = DoLaJanusWrapper(vars(model).get("_dola", model), config)
    vars(model).setdefault("_dola", wrapper)  # keeps what is compiled for later calls
    return wrapper.generate(*args, **{name: value for name, value in kwargs.items() if name not in vars(config)})
