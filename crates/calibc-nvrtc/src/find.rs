//! Where libnvrtc may be, in the order of trust: what the user named, the active Python environments, CUDA's folders, the
//! system. The list is made without opening anything but folders, so that it can be tested and printed.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    sync::RwLock,
};

/// File names of the versions calibc supports, newest first. `libnvrtc.so` comes last: it may be any version.
pub(crate) const FILE_NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// `site-packages` folders of the Python interpreter this process is, if it is one.
static PYTHON_PACKAGES: RwLock<Vec<PathBuf>> = RwLock::new(Vec::new());

/// Names the folders that the running Python interpreter imports packages from. NVIDIA's wheels in them are found before those
/// of every other environment: an interpreter's executable need not lie in its environment, and `VIRTUAL_ENV` may name another.
pub fn set_python_packages(folders: Vec<PathBuf>) {
    *PYTHON_PACKAGES.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = folders;
}

/// What the search reads of the process: environment variables, the path of the executable and where Python packages lie.
pub(crate) struct Surroundings<'a> {
    pub(crate) var: &'a dyn Fn(&str) -> Option<OsString>,
    pub(crate) executable: Option<PathBuf>,
    pub(crate) python_packages: Vec<PathBuf>,
}

impl Surroundings<'_> {
    /// Those of this process.
    pub(crate) fn current() -> Self {
        let python_packages = PYTHON_PACKAGES.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        Self { var: &|name| env::var_os(name), executable: env::current_exe().ok(), python_packages }
    }

    /// A variable that is set to something.
    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        (self.var)(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    }
}

/// Somewhere to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A library file.
    File(PathBuf),
    /// A folder that may hold one of [`FILE_NAMES`].
    Folder(PathBuf),
    /// A bare name for the dynamic loader.
    Loader(&'static str),
}

/// Places to look at, each with who named it.
pub(crate) struct Search {
    /// Set when the user named the place: then nothing else is looked at.
    pub(crate) named_by: Option<&'static str>,
    pub(crate) places: Vec<(&'static str, Place)>,
}

/// Every place, in order.
pub(crate) fn search(explicit: Option<&Path>, around: &Surroundings<'_>) -> Search {
    let named = explicit.map(|path| ("--nvrtc", path.to_owned()));
    if let Some((origin, path)) = named.or_else(|| Some(("CALIBC_NVRTC", around.path("CALIBC_NVRTC")?))) {
        let places = if path.is_dir() {
            let mut folders = vec![path.clone()];
            folders.extend(cuda_folders(&path));
            folders.extend(wheel_folders(&path));
            folders.extend(python_folders(&path));
            folders.into_iter().map(Place::Folder).collect()
        } else {
            vec![Place::File(path)]
        };
        return Search { named_by: Some(origin), places: places.into_iter().map(|place| (origin, place)).collect() };
    }

    let mut folders: Vec<(&'static str, PathBuf)> = Vec::new();
    let mut add = |origin, found: Vec<PathBuf>| folders.extend(found.into_iter().map(|folder| (origin, folder)));
    let imported = around.python_packages.iter().flat_map(|packages| wheel_folders(packages));
    add("this Python's packages", imported.filter(|folder| folder.is_dir()).collect());
    if let Some(root) = around.path("VIRTUAL_ENV") {
        add("VIRTUAL_ENV", python_folders(&root));
    }
    if let Some(root) = around.path("CONDA_PREFIX") {
        add("CONDA_PREFIX", python_folders(&root));
        add("CONDA_PREFIX", cuda_folders(&root));
    }
    // An executable at <environment>/bin/calibc.
    if let Some(root) = around.executable.as_deref().and_then(Path::parent).and_then(Path::parent) {
        add("the executable's Python environment", python_folders(root));
    }
    if let Some(home) = around.path("HOME") {
        add("the user's Python packages", python_folders(&home.join(".local")));
    }
    if let Some(root) = python_on_path(around) {
        add("python3 on PATH", python_folders(&root));
    }
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = around.path(name) {
            add(name, cuda_folders(&root));
        }
    }
    add("the default CUDA folder", vec!["/usr/local/cuda/lib64".into()]);

    let mut places: Vec<(&'static str, Place)> = Vec::new();
    for (origin, folder) in folders {
        if !places.iter().any(|(_, place)| *place == Place::Folder(folder.clone())) {
            places.push((origin, Place::Folder(folder)));
        }
    }
    places.extend(FILE_NAMES.map(|name| ("the system loader", Place::Loader(name))));
    Search { named_by: None, places }
}

/// Folders of a CUDA toolkit or a conda environment that hold libraries.
fn cuda_folders(root: &Path) -> Vec<PathBuf> {
    ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|sub| root.join(sub)).to_vec()
}

/// Folders of NVIDIA's wheels in a `site-packages` folder, CUDA 13 first.
fn wheel_folders(site_packages: &Path) -> Vec<PathBuf> {
    ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"].map(|sub| site_packages.join(sub)).to_vec()
}

/// Folders of NVIDIA's wheels in the Python environment at `root`, newest Python first. Where the environment has none, the
/// one folder that `pip` would make is named, for the error message.
fn python_folders(root: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<(u32, PathBuf)> = Vec::new();
    for lib in ["lib", "lib64"] {
        let Ok(entries) = fs::read_dir(root.join(lib)) else { continue };
        for entry in entries.filter_map(Result::ok) {
            let name = entry.file_name();
            let Some(version) = name.to_str().and_then(|name| name.strip_prefix("python3")) else { continue };
            // `python3` itself is Debian's shared folder and sorts last.
            let minor = version.strip_prefix('.').and_then(|minor| minor.parse().ok()).unwrap_or(0);
            for packages in ["site-packages", "dist-packages"] {
                folders.push((minor, entry.path().join(packages)));
            }
        }
    }
    folders.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let mut found: Vec<PathBuf> =
        folders.iter().flat_map(|(_, packages)| wheel_folders(packages)).filter(|folder| folder.is_dir()).collect();
    if found.is_empty() {
        found.push(root.join("lib/python3*/site-packages/nvidia/cu13/lib"));
    }
    found
}

/// The prefix that `python3` on `PATH` was installed to: /usr for /usr/bin/python3.
fn python_on_path(around: &Surroundings<'_>) -> Option<PathBuf> {
    let path = around.path("PATH")?;
    let python = env::split_paths(&path).map(|folder| folder.join("python3")).find(|file| file.is_file())?;
    Some(python.parent()?.parent()?.to_owned())
}

/// The file that a loaded function at `address` came from, as the system has it mapped.
pub(crate) fn mapped_file(address: usize) -> Option<PathBuf> {
    file_in_maps(&fs::read_to_string("/proc/self/maps").ok()?, address)
}

/// Finds the mapping of `address` in the text of /proc/PID/maps: `start-end perms offset dev inode path`.
fn file_in_maps(maps: &str, address: usize) -> Option<PathBuf> {
    let line = maps.lines().find(|line| {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let parse = |hex| usize::from_str_radix(hex, 16).ok();
        range.and_then(|(start, end)| Some(parse(start)? <= address && address < parse(end)?)).unwrap_or(false)
    })?;
    let path = line.get(line.find('/')?..)?;
    Some(PathBuf::from(path))
}

/// The builtins library of NVRTC `version` beside `library`. Some releases (the wheel 13.0.88 among them) cannot find their
/// own unless it is already loaded.
pub(crate) fn builtins_beside(library: &Path, version: (u32, u32)) -> Option<PathBuf> {
    let real = fs::canonicalize(library).ok()?;
    let name = format!("libnvrtc-builtins.so.{}.{}", version.0, version.1);
    Some(real.parent()?.join(OsStr::new(&name))).filter(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(explicit: Option<&Path>, vars: &[(&str, PathBuf)], executable: Option<PathBuf>) -> Search {
        let var = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| value.clone().into_os_string());
        search(explicit, &Surroundings { var: &var, executable, python_packages: Vec::new() })
    }

    fn make(root: &Path, sub: &str) -> PathBuf {
        let folder = root.join(sub);
        fs::create_dir_all(&folder).expect("the temporary folder is writable");
        folder
    }

    #[test]
    fn a_named_place_is_the_only_one() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let vars = [("CALIBC_NVRTC", PathBuf::from("/from/env.so")), ("CUDA_HOME", dir.path().to_owned())];
        let by_flag = places(Some(Path::new("/from/flag.so")), &vars, None);
        assert_eq!(by_flag.named_by, Some("--nvrtc"));
        assert_eq!(by_flag.places, [("--nvrtc", Place::File("/from/flag.so".into()))]);
        let by_env = places(None, &vars, None);
        assert_eq!(by_env.named_by, Some("CALIBC_NVRTC"));
        assert_eq!(by_env.places, [("CALIBC_NVRTC", Place::File("/from/env.so".into()))]);
    }

    #[test]
    fn a_named_folder_may_be_the_libraries_a_toolkit_or_an_environment() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let wheel = make(dir.path(), "lib/python3.12/site-packages/nvidia/cu13/lib");
        let found = places(Some(dir.path()), &[], None);
        for folder in [dir.path().to_owned(), dir.path().join("lib64"), wheel] {
            assert!(found.places.contains(&("--nvrtc", Place::Folder(folder.clone()))), "{}", folder.display());
        }
    }

    #[test]
    fn unnamed_places_come_in_the_documented_order_without_repetition() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let venv = make(dir.path(), "venv");
        let old = make(&venv, "lib/python3.9/site-packages/nvidia/cuda_nvrtc/lib");
        let new = make(&venv, "lib/python3.13/site-packages/nvidia/cu13/lib");
        let conda = make(dir.path(), "conda");
        let beside = make(dir.path(), "env/lib/python3.11/site-packages/nvidia/cu13/lib");
        let cuda = make(dir.path(), "cuda");
        let vars = [
            ("VIRTUAL_ENV", venv),
            ("CONDA_PREFIX", conda.clone()),
            ("CUDA_HOME", cuda.clone()),
            ("CUDA_PATH", cuda.clone()),
            ("CALIBC_NVRTC", PathBuf::new()),
        ];
        let found = places(None, &vars, Some(dir.path().join("env/bin/calibc")));
        assert_eq!(found.named_by, None, "an empty variable names nothing");
        let at = |wanted: &Path| {
            let hits = found.places.iter().enumerate().filter(|(_, (_, p))| *p == Place::Folder(wanted.to_owned()));
            let hits: Vec<usize> = hits.map(|(i, _)| i).collect();
            assert_eq!(hits.len(), 1, "{}", wanted.display());
            hits[0]
        };
        let order = [new, old, conda.join("lib"), beside, cuda.join("lib64"), "/usr/local/cuda/lib64".into()];
        assert!(order.windows(2).all(|pair| at(&pair[0]) < at(&pair[1])), "{:#?}", found.places);
        let last: Vec<&Place> = found.places.iter().rev().take(3).map(|(_, place)| place).collect();
        let loader = ["libnvrtc.so", "libnvrtc.so.12", "libnvrtc.so.13"].map(Place::Loader);
        assert_eq!(last, loader.iter().collect::<Vec<_>>());
    }

    #[test]
    fn the_running_interpreter_comes_before_the_active_environment() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let venv = make(dir.path(), "venv");
        let active = make(&venv, "lib/python3.12/site-packages/nvidia/cu13/lib");
        let packages = dir.path().join("own/site-packages");
        let own = make(&packages, "nvidia/cuda_nvrtc/lib");
        let var = |name: &str| (name == "VIRTUAL_ENV").then(|| venv.clone().into_os_string());
        let without_wheels = dir.path().join("elsewhere");
        let around = Surroundings { var: &var, executable: None, python_packages: vec![without_wheels, packages] };
        let found = search(None, &around);
        let folders = [("this Python's packages", own), ("VIRTUAL_ENV", active)];
        assert_eq!(found.places[..2], folders.map(|(origin, folder)| (origin, Place::Folder(folder))));
    }

    #[test]
    fn maps_tell_the_file_of_an_address() {
        let maps = "00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/dbus daemon\n7f00-7fff rw-p 0 00:00 0\n";
        assert_eq!(file_in_maps(maps, 0x0040_0010), Some("/usr/bin/dbus daemon".into()));
        assert_eq!(file_in_maps(maps, 0x0045_2000), None);
        assert_eq!(file_in_maps(maps, 0x7f01), None);
        // This process: the maps must place this very function in a file.
        let here = mapped_file(maps_tell_the_file_of_an_address as fn() as usize).expect("tests run on Linux");
        assert!(here.is_file(), "{}", here.display());
    }
}
