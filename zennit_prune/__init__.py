'''Prune networks by explaining them: remove the channels of least relevance, exactly.

Names are imported from their rooms when they are first used; ``__init__.pyi`` lists them, for this module and for type
checkers alike.
'''
import lazy_loader

__version__ = '0.1.0'

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
