"""The explorer: pages on which people look at a catalogue, search it and judge its features. Nothing here needs torch but `model_worker`.

`app` makes the application, `web` has what every page shares, `library` holds the open catalogue, and each other module has the pages of
its name with their addresses in the JSON API.
"""
