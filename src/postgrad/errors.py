"""Every error postgrad raises on purpose.

PostgradError
├── UserError (also a ValueError)   something the user can mend
│   ├── ConfigError                 a setting, a flag, a recipe
│   ├── DataError                   a file, its columns, its rows
│   ├── TemplateError               a chat template or tokenizer
│   ├── ModelError                  a model folder or architecture
│   ├── ArtefactError               a checkpoint or store that is damaged or foreign
│   ├── EndpointError               a server that is down or answers nonsense
│   └── GateError                   a quality gate that refused to go on
├── Diverged                        a loss or gradient stopped being finite
└── Interrupted                     a stop signal; the state is saved
"""


class PostgradError(Exception):
    """Base of all errors raised on purpose."""


class UserError(PostgradError, ValueError):
    """Something the user can mend; the message says how."""


class ConfigError(UserError):
    """A setting, a flag or a recipe is wrong."""


class DataError(UserError):
    """A file, its columns or its rows are wrong."""


class TemplateError(UserError):
    """A chat template or tokenizer cannot be used for training."""


class ModelError(UserError):
    """A model folder or architecture cannot be used."""


class ArtefactError(UserError):
    """A checkpoint or a store is damaged, or belongs to another run."""


class EndpointError(UserError):
    """A server is down or answers nonsense."""


class GateError(UserError):
    """A quality gate refused to go on."""


class Diverged(PostgradError):
    """A loss or a gradient stopped being finite; the last good checkpoint stays."""


class Interrupted(PostgradError):
    """A stop signal came; the state is saved and the same command continues."""
