"""`python -m quest_deploy`: the program as a module, the form that launchers of several processes
take.
"""

from quest_deploy.cli.main import main

main()
