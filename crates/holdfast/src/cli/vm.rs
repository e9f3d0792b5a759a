//! `holdfast vm` and `holdfast explain`.

use std::io::Read;
use std::path::{Component, Path};

use holdfast_api as api;

use super::args::{CreateArgs, DefinitionFormat, ExplainCommand, JobArgs, PriorityArg, VmCommand};
use super::client::Client;
use super::{CliError, Done, console, job, output};

/// The largest definition that is read, in bytes.
const LARGEST_DEFINITION: u64 = 1 << 20;

/// `holdfast vm`.
pub async fn vm(client: &Client, command: VmCommand, json: bool) -> Done {
    let act = async |vm: JobArgs, action: &str, request: serde_json::Value| {
        let begun = client.post(&format!("{}/{action}", path(&vm.name)), &request).await?;
        job::wait(client, begun, vm.wait.no_wait, json).await
    };
    let nothing = || serde_json::json!({});
    match command {
        VmCommand::Create(args) => create(client, *args, json).await,
        VmCommand::List => {
            let vms: Vec<api::VmView> = client.get("/api/v1/vms").await?;
            if json {
                return output::json(&vms);
            }
            let row = |vm: &api::VmView| {
                [
                    vm.name.clone(),
                    output::word(&vm.state),
                    output::or_dash(vm.node.as_ref()),
                    vm.cpus.to_string(),
                    output::size(vm.memory_bytes),
                    output::word(&vm.priority),
                    vm.hold.clone().unwrap_or_default(),
                ]
            };
            output::table(["name", "state", "node", "cpus", "memory", "priority", "note"], vms.iter().map(row))
        }
        VmCommand::Show { name, output } => {
            let vm: api::VmView = client.get(&path(&name)).await?;
            match output {
                Some(DefinitionFormat::Yaml) => {
                    let yaml = serde_norway::to_string(&vm.definition);
                    output::line(yaml.map_err(|error| CliError::Local(error.to_string()))?.trim_end())
                }
                Some(DefinitionFormat::Json) => output::json(&vm.definition),
                None if json => output::json(&vm),
                None => show(&vm),
            }
        }
        VmCommand::Start(vm) => act(vm, "start", nothing()).await,
        VmCommand::Stop { vm, force } => act(vm, "stop", serde_json::json!({ "force": force })).await,
        VmCommand::Restart(vm) => act(vm, "restart", nothing()).await,
        VmCommand::Pause(vm) => act(vm, "pause", nothing()).await,
        VmCommand::Resume(vm) => act(vm, "resume", nothing()).await,
        VmCommand::Migrate { vm, to } => act(vm, "migrate", serde_json::json!({ "to": to })).await,
        VmCommand::Delete(vm) => {
            let begun = client.delete(&path(&vm.name)).await?;
            job::wait(client, begun, vm.wait.no_wait, json).await
        }
        VmCommand::Console { name } => console::console(client, &format!("{}/console", path(&name)), &name).await,
    }
}

/// Where a VM is in the API. A name with other letters than names have is sent
/// as something that no VM is called, so that the answer is the usual one.
pub fn path(name: &str) -> String {
    format!("/api/v1/vms/{}", segment(name))
}

/// A name as one segment of a path: what is not allowed there is encoded (RFC
/// 3986, section 2.1).
pub fn segment(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    match name {
        // A client or server may resolve these as directories.
        "." | ".." => name.replace('.', "%2E"),
        _ => name
            .bytes()
            .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
            .collect(),
    }
}

fn show(vm: &api::VmView) -> Done {
    let disk = |disk: &api::DiskView| {
        format!("{}:{} ({}, {})", disk.volume, disk.file, output::size(disk.size_bytes), output::word(&disk.format))
    };
    let nic = |nic: &api::NicDefinition| {
        let vlan = nic.vlan.map(|vlan| format!(", VLAN {vlan}")).unwrap_or_default();
        format!("{} ({}{vlan})", nic.switch, output::or_dash(nic.mac.as_ref()))
    };
    let list = |items: Vec<String>| if items.is_empty() { "-".into() } else { items.join("\n") };
    let mut facts = vec![
        ("name", vm.name.clone()),
        ("id", vm.id.clone()),
        ("state", output::word(&vm.state)),
        ("standing", vm.standing.clone()),
        ("node", output::or_dash(vm.node.as_ref())),
        ("epoch", vm.epoch.to_string()),
        ("wanted", output::word(&vm.desired)),
        ("cpus", vm.cpus.to_string()),
        ("memory", output::size(vm.memory_bytes)),
        ("machine", output::or_dash(vm.definition.machine.as_ref())),
        ("priority", output::word(&vm.priority)),
        ("disks", list(vm.disks.iter().map(disk).collect())),
        ("nics", list(vm.nics.iter().map(nic).collect())),
        ("created", output::moment(vm.created_ms)),
    ];
    if let Some(target) = &vm.target {
        facts.push(("moves to", target.clone()));
    }
    if let Some(boot) = &vm.definition.boot {
        facts.push(("kernel", boot.kernel.clone()));
        facts.push(("initrd", output::or_dash(boot.initrd.as_ref())));
        facts.push(("append", boot.append.clone()));
    }
    if vm.crashes > 0 {
        facts.push(("crashes", vm.crashes.to_string()));
    }
    output::facts(&facts)
}

async fn create(client: &Client, args: CreateArgs, json: bool) -> Done {
    let wait = args.wait;
    let start = args.start;
    let mut vm = match &args.file {
        Some(file) => {
            let mut vm = read(file)?;
            if let Some(name) = args.name {
                vm.name = name;
            }
            vm
        }
        None => from_flags(args)?,
    };
    for file in files(&mut vm) {
        *file = named(file, client.is_local())?;
    }
    let begun = client.post("/api/v1/vms", &api::CreateVm { vm, start }).await?;
    job::wait(client, begun, wait.no_wait, json).await
}

/// Every file that a definition names.
fn files(vm: &mut api::VmDefinition) -> impl Iterator<Item = &mut String> {
    let boot = vm.boot.iter_mut().flat_map(|boot| std::iter::once(&mut boot.kernel).chain(&mut boot.initrd));
    vm.disks.iter_mut().filter_map(|disk| disk.image.as_mut()).chain(boot)
}

/// A file as the agent takes it: absolute, or `VOLUME:PATH`. Paths are relative
/// to this process only where the agent sees the same files.
fn named(file: &str, local: bool) -> Result<String, CliError> {
    let path = Path::new(file);
    let on_volume = file.split_once(':').is_some_and(|(volume, _)| !volume.is_empty() && !volume.contains('/'));
    if path.is_absolute() || (on_volume && !(local && path.exists())) {
        return Ok(file.into());
    }
    if !local {
        let text =
            format!("{file:?} is no absolute path: write it as the node that is asked sees it, or as VOLUME:PATH");
        return Err(CliError::Local(text));
    }
    let absolute = std::env::current_dir()?.join(path.strip_prefix(Component::CurDir).unwrap_or(path));
    absolute.into_os_string().into_string().map_err(|path| CliError::Local(format!("{path:?} is no text")))
}

fn read(file: &Path) -> Result<api::VmDefinition, CliError> {
    let failed = |why: String| CliError::Local(format!("the definition {} cannot be used: {why}", file.display()));
    let open = || -> std::io::Result<Box<dyn Read>> {
        match file == Path::new("-") {
            true => Ok(Box::new(std::io::stdin())),
            false => Ok(Box::new(std::fs::File::open(file)?)),
        }
    };
    let mut text = String::new();
    let input = open().map_err(|error| failed(error.to_string()))?;
    let read = input.take(LARGEST_DEFINITION).read_to_string(&mut text);
    read.map_err(|error| failed(error.to_string()))?;
    // JSON is YAML too.
    serde_norway::from_str(&text).map_err(|error| failed(error.to_string()))
}

fn from_flags(args: CreateArgs) -> Result<api::VmDefinition, CliError> {
    let mut disks = args.disk;
    if let Some(first) = disks.first_mut() {
        first.image = args.image;
    }
    Ok(api::VmDefinition {
        name: args.name.ok_or_else(|| CliError::Local("name the VM".into()))?,
        cpus: args.cpus,
        memory: args.memory,
        machine: args.machine,
        cpu_model: args.cpu_model,
        boot: args.kernel.map(|kernel| api::KernelBoot {
            kernel,
            initrd: args.initrd,
            append: args.append.unwrap_or_default(),
        }),
        disks,
        nics: args.nic,
        priority: match args.priority {
            PriorityArg::High => api::Priority::High,
            PriorityArg::Medium => api::Priority::Medium,
            PriorityArg::Low => api::Priority::Low,
            PriorityArg::None => api::Priority::None,
        },
        stop_timeout_s: 60,
    })
}

/// `holdfast explain`.
pub async fn explain(client: &Client, command: ExplainCommand, json: bool) -> Done {
    let ExplainCommand::Vm { name } = command;
    let told: api::Explanation = client.get(&format!("{}/explain", path(&name))).await?;
    if json {
        return output::json(&told);
    }
    output::line(&format!("{}.", told.standing))?;
    for cause in &told.causes {
        output::line(&format!("  {}  {}", output::moment(cause.at_ms), cause.text))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_as_the_agent_sees_them() {
        let here = std::env::current_dir().unwrap();
        let here = |file: &str| here.join(file).display().to_string();
        assert_eq!(named("/a/b.qcow2", true).unwrap(), "/a/b.qcow2");
        assert_eq!(named("b.qcow2", true).unwrap(), here("b.qcow2"));
        assert_eq!(named("./b.qcow2", true).unwrap(), here("b.qcow2"));
        assert_eq!(named("main:images/b.qcow2", true).unwrap(), "main:images/b.qcow2");
        assert_eq!(named("main:images/b.qcow2", false).unwrap(), "main:images/b.qcow2");
        assert_eq!(named("./a:b", true).unwrap(), here("a:b"));
        assert!(named("b.qcow2", false).is_err());
    }

    #[test]
    fn a_name_is_one_segment_of_a_path() {
        assert_eq!(segment("web-1.prod_x"), "web-1.prod_x");
        assert_eq!(segment("a/b?c d"), "a%2Fb%3Fc%20d");
        assert_eq!(segment(".."), "%2E%2E");
    }

    #[test]
    fn a_definition_is_read_from_yaml_and_from_json() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "name: web\nmemory: 1G\ndisks: [{volume: main, size: 20G}]\n").unwrap();
        let vm = read(file.path()).unwrap();
        std::fs::write(file.path(), serde_json::to_string(&vm).unwrap()).unwrap();
        assert_eq!(read(file.path()).unwrap(), vm);
        std::fs::write(file.path(), "name: web\n").unwrap();
        let refused = read(file.path()).unwrap_err().to_string();
        assert!(refused.contains("memory") && refused.contains(&file.path().display().to_string()), "{refused}");
    }
}
