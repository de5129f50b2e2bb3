"""An example of a plug-in for s2ap-deploy: nothing here is imported before somebody names it."""
