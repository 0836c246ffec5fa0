"""Callbacks for the training loops of other libraries; each file needs its library."""
