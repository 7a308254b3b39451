"""Bundles as MONAI Deploy applications: DICOM in; DICOM segmentation, measurements and a report out.

``python -m medsa_nets.deploy -i DICOM -o OUT -m BUNDLE`` runs an application, ``python -m medsa_nets.deploy package``
writes what a container is built from. Both need the extra ``deploy``.
"""
