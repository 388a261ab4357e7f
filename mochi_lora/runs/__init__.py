"""What commands share: the folder, plan, events and previews of a run, the processes of a launch and the models they load."""
