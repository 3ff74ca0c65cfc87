"""What a failed file or connection means to a person, by its kind."""

import errno
import os
import re

_FULL = 'make room'
_PATH = 'check the path'
_OWN = 'check its rights, or name a path of your own'
# By number of error: what is so, and what to do; {} is the path.
_OF_THE_USER = {
  errno.ENOENT: ('{} does not exist', _PATH),
  errno.ENOTDIR: ('a part of the path {} is a file, not a folder', _PATH),
  errno.EISDIR: ('{} is a folder, and a file is needed', 'name a file'),
  errno.EEXIST: ('{} is there already', 'name another'),
  errno.ENAMETOOLONG: ('{} is longer than a name may be', 'shorten it'),
  errno.ELOOP: ('the links at {} lead in a circle', _PATH),
  errno.EACCES: ('permission denied: {}', _OWN),
  errno.EPERM: ('permission denied: {}', _OWN),
  errno.EROFS: ('{} is on a read-only file system', 'name a path elsewhere'),
}
_OF_THE_MACHINE = {
  errno.ENOSPC: ('No space left on device: {}', _FULL),
  errno.EDQUOT: ('the disk quota is used up at {}', _FULL),
  errno.EFBIG: ('{} is larger than its disk lets a file be', _FULL),
  errno.EIO: ('Input/output error: the disk of {} failed', 'mend the disk'),
  errno.ESTALE: ('the network disk of {} was lost', 'mount it again'),
  errno.EMFILE: (
    'Too many open files, at {}',
    'raise the limit (ulimit -n)',
  ),
  errno.ENFILE: ('the machine has too many files open, at {}', 'close some'),
  errno.ENOMEM: ('no memory is left, at {}', 'free some'),
}
_KINDS = {**_OF_THE_USER, **_OF_THE_MACHINE}
# Libraries say what the system said in words, with or without the number.
_NUMBER = re.compile(r'(?:[Oo][Ss] error |Errno |code: )(\d+)')
_WORDS = (
  errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO,
  errno.EMFILE,
)  # fmt: skip
_QUOTED_PATH = re.compile(r'["\'](/[^"\']+)["\']')


def sentence(error):
  """Returns what an error means, and what to do; '' if nobody knows its kind.

  Args:
    error: An OSError, or an error of a library that tells of one.
  """
  number, path = _number_and_path(error)
  if number in _KINDS:
    fact, cure = _KINDS[number]
    fact = fact.format(path or 'a file')
    if number in _OF_THE_MACHINE:
      cure = f'what was committed is whole: {cure}, and give the same command'
    return f'{fact}; {cure}.'
  if isinstance(error, BrokenPipeError):
    return 'nobody reads the output any more.'
  if isinstance(error, ConnectionError | TimeoutError):
    return f'the network failed ({_text(error)}); try again once it works.'
  return ''


def cure(error):
  """Returns what to do about an error, in the imperative."""
  number, _ = _number_and_path(error)
  return _KINDS[number][1] if number in _KINDS else 'make room or mend the disk'


def is_of_the_user(error):
  """Returns whether a path that the user gave is what is wrong."""
  return _number_and_path(error)[0] in _OF_THE_USER


def is_denied(error):
  """Returns whether nothing may be written at a path."""
  denied = errno.EACCES, errno.EPERM, errno.EROFS
  return _number_and_path(error)[0] in denied


def _number_and_path(error):
  """Returns the number of a system's error, or None, and the path or ''."""
  while error is not None:
    # Of args, as an OSError without a number does not show its text once it has
    # a path.
    text = ' '.join(map(str, error.args))
    if isinstance(error, OSError):
      number, path = error.errno, error.filename or error.filename2
      # numpy, where the disk took a part of an array.
      if re.search(r'\d+ requested and \d+ written', text):
        number = errno.ENOSPC
    else:
      number, path = _number_in(text), None
    if number in _KINDS:
      found = _QUOTED_PATH.search(text)
      return number, path or (found[1] if found else '')
    error = error.__cause__
  return None, ''


def _number_in(text):
  """Returns the number of the system's error that a text tells of, or None."""
  if found := _NUMBER.search(text):
    return int(found[1])
  words = [number for number in _WORDS if os.strerror(number) in text]
  return words[0] if words else None


def _text(error):
  return ' '.join(str(error).split())[:200]
